"""The rows of attention_test.py: one implementation of MLA each, over the same weights, requests and histories.

A row has `name`; `start(histories, room)` loads the requests' histories and makes room for that many more tokens each;
`run(hidden_states, lengths)` is one pass over all requests, packed `[T, hidden] -> [T, hidden]`, that grows the caches;
`rewind()` takes every request back to its history.
"""
