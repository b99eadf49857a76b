"""One PostgreSQL: its programs, its images, its clusters, and the warden over them."""
