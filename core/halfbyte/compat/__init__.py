"""halfbyte under the names of other libraries."""
