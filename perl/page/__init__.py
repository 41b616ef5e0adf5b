"""The report page: one HTML file that answers for a run, read from finished run folders."""
