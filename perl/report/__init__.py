"""Pages, tables and plots made from runs."""
