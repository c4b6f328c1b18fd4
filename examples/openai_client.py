"""OpenAI's client against a running server: a streamed chat, JSON that fits a schema, embeddings.

serve --model demo &
python examples/openai_client.py [http://localhost:8000/v1]
"""

import sys

from openai import OpenAI


def main(url: str = "http://localhost:8000/v1", key: str = "none") -> None:
    client = OpenAI(base_url=url, api_key=key)
    model = client.models.list().data[0].id

    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Reverse a list in Python."}],
        max_tokens=64,
        stream=True,
    )
    for event in stream:
        print(event.choices[0].delta.content or "", end="", flush=True)
    print()

    # A grammar decides which tokens may come next, so that the answer always fits the schema.
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "A city, and whether it is a capital."}],
        max_tokens=128,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "city",
                "schema": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string", "maxLength": 20},
                        "capital": {"type": "boolean"},
                    },
                    "required": ["name", "capital"],
                    "additionalProperties": False,
                },
            },
        },
    )
    print(answer.choices[0].message.content)

    vectors = client.embeddings.create(model=model, input=["a list", "a dictionary"])
    print(len(vectors.data), "vectors of", len(vectors.data[0].embedding), "numbers")


if __name__ == "__main__":
    main(*sys.argv[1:])
