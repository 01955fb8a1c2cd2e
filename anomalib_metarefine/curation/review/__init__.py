"""A person's review of the images of a curation, in a local web page."""
