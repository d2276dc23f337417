//! Text that reaches a person's terminal or log from the guest.

/// One line of at most `max` characters, in which nothing acts on a terminal: line breaks and tabs become spaces, other control
/// characters are dropped.
pub fn one_line(text: &str, max: usize) -> String {
    let spaced = text.trim().chars().map(|c| if matches!(c, '\n' | '\r' | '\t') { ' ' } else { c });
    spaced.filter(|c| !c.is_control()).take(max).collect()
}

/// Lines without control characters, empty ones left out.
pub fn lines(text: &str) -> impl Iterator<Item = String> + '_ {
    text.lines()
        .map(|line| line.replace('\t', " ").chars().filter(|c| !c.is_control()).collect())
        .filter(|line: &String| !line.trim().is_empty())
}

/// An error and its causes in one line, each cause after a colon.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_of_a_guest_do_not_reach_the_terminal() {
        assert_eq!(one_line("a\x1b[2Jb\nc\u{9b}d\n", 100), "a[2Jb cd");
        assert_eq!(one_line("abcdef", 3), "abc");
        assert_eq!(lines("one\r\n\n\x1b[31mtwo\n").collect::<Vec<_>>(), ["one", "[31mtwo"]);
    }
}
