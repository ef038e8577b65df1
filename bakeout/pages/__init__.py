"""What `features`, `select` and `sweep` show."""
