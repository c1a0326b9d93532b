"""What the package uses of other libraries that is not public, a file per library."""
