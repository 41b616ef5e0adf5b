"""Names that libraries do not promise to keep, one file a library, each checked when it is imported."""
