"""OpenAI's API: requests read, prompts built, events and bodies written."""
