"""Reports and studies: which runs may be compared, and how."""
