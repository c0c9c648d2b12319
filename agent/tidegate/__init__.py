"""tidegate: from permissive to strict mTLS, on evidence."""
