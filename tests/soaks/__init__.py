"""Long random tests, each a command, with a short form in the suite."""
