"""Training jobs beside a serving engine: OpenAI's files and fine-tuning jobs, kept in a folder."""
