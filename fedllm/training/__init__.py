"""One site's round."""
