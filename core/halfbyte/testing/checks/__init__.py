"""The checks.  Each module is a theme; `halfbyte.testing.plugin` makes the parameters."""
