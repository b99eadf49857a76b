"""A test suite: its servers, its templates, the databases of tests, reports of failed tests."""
