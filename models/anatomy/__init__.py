"""What models are made of, as data: the words in which a family's file describes itself."""
