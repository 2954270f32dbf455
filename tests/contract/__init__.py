"""What the pages of the guide promise, tested as a user meets it (see CONTRIBUTING)."""
