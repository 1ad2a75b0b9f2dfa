"""Text data: from files to documents, to token ids, to batches of packed rows.

The entry points, in the order in which a training job calls them:

- `tokenizer.load(spec)`: the tokenizer of `data.tokenizer`.
- `corpus.prepare(data_config, tokenizer)`: the documents as token ids, split into
  training and held-out sides; tokenised once and cached on disk.
- `corpus.Corpus.cut(length)`: the same without what rows of `length` tokens have no
  room for; of text nothing, of conversations their ends.
- `batches.train_iterator(corpus, ...)`: endless training batches; the state of the
  iterator can be saved and restored.
- `batches.held_out_batches(corpus, ...)`: every held-out row once.

Others:

- `corpus.documents(data_config)`: the training documents as text.
- `tokenizer.train(texts, vocab_size)`: a tokenizer trained on texts.
- `tokenizer.from_json(text)`: the tokenizer of a checkpoint.
- `chat.ChatEncoder(tokenizer)`: conversations as ids, by a chat template.
- `jsonl.read_jsonl(file)`: the rows of a file of JSON Lines.

Files below them: `sources` finds the files of `data.source`, `formats` reads one file,
`rows` reads one as rows, `chat_rows` makes messages of a row, `chat_template` renders
them, `python_docs` is the source "builtin", `token_cache` keeps token ids on disk, and
`packing` fills rows with whole conversations. `surrogates` repairs text that UTF-8
cannot write.
"""
