"""The shipped scheduler in virtual time: an executor that has a price instead of a model."""
