"""What models are asked: rows of files, texts, questions, prompts, and what an answer is worth."""
