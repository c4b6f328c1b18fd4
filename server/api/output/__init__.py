"""From a model's text to reasoning, content and tool calls, in each family's format."""
