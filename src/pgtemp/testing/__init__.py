"""A test suite: its servers and templates, each test's databases, the reports of failed tests."""
