"""Our engine inside other people's robot software. Each module needs that software, and nothing else imports it."""
