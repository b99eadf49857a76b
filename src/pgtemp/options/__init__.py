"""Every option once; the command line, ini files and the documentation derive from it."""
