"""What is used of other libraries beyond their documented interface: one file a library, checked when imported."""
