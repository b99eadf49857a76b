"""A suite of tests: its servers and templates, what each test holds, what is said when it fails."""
