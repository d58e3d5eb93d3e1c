"""The quickstart's data and its baseline."""
