"""What an attacker gets back: swept attacks on any carrier, and the worst of them."""
