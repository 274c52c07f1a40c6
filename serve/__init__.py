"""From a bundle to answers: model repository, Triton server, client. Needs no torch."""
