"""The slow twin of duetto.runner.proposers.text_index: a search through all that was written."""

from collections import Counter

from duetto.runner.proposers.text_index import MAX_MATCHES, search_orders


class SlowIndex:
    """The slow twin: keeps every text whole, with the numbers of its nodes, and looks at all."""

    def __init__(self, min_match, max_match, capacity):
        self.orders = search_orders(min_match, max_match)
        self.max_match, self.capacity = max_match, capacity
        self.texts = {}  # text -> [(node, token)]
        self.num_nodes = 0
        self.floor = 0

    def append(self, text, token_ids):
        for token_id in token_ids:
            self.texts.setdefault(text, []).append((self.num_nodes, token_id))
            self.num_nodes += 1
        self.floor = max(self.floor, self.num_nodes - self.capacity)

    def kept(self):
        for nodes in self.texts.values():
            yield [(node, token) for node, token in nodes if node >= self.floor]

    def places(self, tail):
        """(node of the last token, text, index after it), newest first, where `tail` stands."""
        found = []
        for nodes in self.kept():
            tokens = [token for _, token in nodes]
            for end in range(len(tail), len(tokens)):  # one more token must follow
                if tokens[end - len(tail) : end] == tail:
                    found.append((nodes[end - 1][0], tokens, end))
        return sorted(found, key=lambda place: -place[0])

    def propose(self, text, most, min_share=0.0):
        for order in self.orders:
            places = self.places(list(text[-order:]))[:MAX_MATCHES] if len(text) >= order else []
            if places:
                break
        else:
            return None
        lengths = [self.length(text, tokens, end) for _, tokens, end in places]
        best = max(lengths)
        rest = [p[1][p[2] :] for p, length in zip(places, lengths, strict=True) if length == best]
        num, drafts = len(rest), []
        while rest and len(drafts) < most:
            counts = Counter(each[0] for each in rest)
            token_id = next(e[0] for e in rest if counts[e[0]] == max(counts.values()))
            if counts[token_id] < min_share * num:
                break
            drafts.append(token_id)
            rest = [each[1:] for each in rest if each[0] == token_id and len(each) > 1]
        return best, tuple(drafts)

    def length(self, text, tokens, end):
        length = 0
        while length < min(self.max_match, len(text), end):
            if tokens[end - 1 - length] != text[-1 - length]:
                break
            length += 1
        return length
