"""The program that trains the policy, and what it is made of."""
