"""Services of this machine that are no containers: where they are found, and how they are treated."""
