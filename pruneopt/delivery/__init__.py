"""What comes out: masks applied, files, the report."""
