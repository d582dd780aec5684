"""How a person might ask for an article: the phrasings a prompted model is trained on."""


def article_prompts(title: str, description: str, topic: str) -> tuple[str, ...]:
    """Several prompts for one article; which one is used changes from epoch to epoch.

    Args:
      title: `Dog`.
      description: `Domesticated species of canid`, or empty.
      topic: `Biology and health sciences`; empty or `Uncategorized` where there is none.

    Returns:
      The title, `Write about` the title and, where they exist, the description, both together and the topic.
    """
    title, description, topic = title.strip(), description.strip(), topic.strip()
    prompts = [title, f"Write about {title}"]
    if description:
        prompts += [description, f"{title}: {description[0].lower()}{description[1:]}"]
    if topic and topic != "Uncategorized":
        prompts.append(topic)
    return tuple(prompts)
