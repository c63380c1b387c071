"""Online: the service that loads a teacher bundle and answers with embeddings and neighbours."""
