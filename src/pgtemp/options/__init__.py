"""Each option is declared once; the command line, ini files and documentation derive from it."""
