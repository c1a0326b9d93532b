"""Private APIs of the libraries below, a file for each: what is used, and why."""
