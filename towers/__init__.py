"""From features to vectors: embeddings, interaction, tower."""
