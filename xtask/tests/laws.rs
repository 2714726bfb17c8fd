//! The tree keeps the laws of docs/architecture.md.

#[test]
fn the_tree_is_tidy() {
    let breaches = xtask::tidy::check(&xtask::tidy::root()).expect("the tree can be read");
    let list: Vec<&str> = breaches.iter().map(|breach| breach.0.as_str()).collect();
    assert!(list.is_empty(), "{} breaches:\n{}", list.len(), list.join("\n"));
}
