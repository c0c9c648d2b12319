"""Client and server of the intent and catalog API (Consul's HTTP), and the store behind the server."""
