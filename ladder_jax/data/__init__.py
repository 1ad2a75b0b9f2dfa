"""From files to documents, from documents to token ids, from ids to batches."""
