"""The engines that `make bench-engine` compares, each a program that loads once and answers questions on its pipe."""
