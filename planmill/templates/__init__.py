"""HTML templates of the reports."""
