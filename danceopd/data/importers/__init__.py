"""Other people's data sets, read as a stream into the project's own records (see `docs/data.md`)."""
