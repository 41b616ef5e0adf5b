"""The roles of alignment on one frozen base: who computes, and with what."""
