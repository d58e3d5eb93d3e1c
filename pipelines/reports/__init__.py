"""Every HTML page and chart, and the tables that describe datasets and runs."""
