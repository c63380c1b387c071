"""The run's own account of itself: pictures over time, and one page that can be read anywhere."""
