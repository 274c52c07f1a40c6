"""The log and what is prepared from it: schema, vocabularies, datasets, batches."""
