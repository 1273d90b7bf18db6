"""What comes out: masks applied, smaller programs, files, weights and programs for others, the report."""
