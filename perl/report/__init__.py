"""The report: report.json, and the page and the tables that are made of finished runs."""
