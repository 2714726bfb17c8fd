//! Who a command runs as, from the guest's `passwd` and `group` files (passwd(5), group(5)). Pure: files come as bytes.
//!
//! Name services other than these files are not asked: the agent is static, and runs before they do.

use alloc::vec::Vec;

/// A user as a command sees it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Account {
    pub user: u32,
    pub group: u32,
    pub groups: Vec<u32>,
    pub name: Vec<u8>,
    pub home: Vec<u8>,
    pub shell: Vec<u8>,
}

fn lines(file: &[u8]) -> impl Iterator<Item = Vec<&[u8]>> {
    file.split(|&byte| byte == b'\n').map(|line| line.split(|&byte| byte == b':').collect())
}

fn number(text: &[u8]) -> Option<u32> {
    core::str::from_utf8(text).ok()?.parse().ok()
}

/// Finds the account for `USER` or `USER:GROUP`, names or numbers; empty is root. A number needs no entry.
pub fn find(who: &[u8], passwd: &[u8], group: &[u8]) -> Option<Account> {
    let mut parts = who.splitn(2, |&byte| byte == b':');
    let user = parts.next().filter(|user| !user.is_empty()).unwrap_or(b"0");
    let wanted_group = parts.next();
    let wanted = number(user);
    let entry = lines(passwd).find_map(|fields| {
        let &[name, _, id, group, _, home, shell] = fields.as_slice() else { return None };
        let id = number(id)?;
        if name != user && wanted != Some(id) {
            return None;
        }
        let (name, home, shell) = (name.to_vec(), home.to_vec(), shell.to_vec());
        Some(Account { user: id, group: number(group)?, groups: Vec::new(), name, home, shell })
    });
    let mut account = match (entry, wanted) {
        (Some(account), _) => account,
        (None, Some(id)) => {
            let name = if id == 0 { b"root".to_vec() } else { Vec::new() };
            let home = if id == 0 { b"/root".to_vec() } else { b"/".to_vec() };
            Account { user: id, group: id, name, home, ..Account::default() }
        }
        (None, None) => return None,
    };
    if let Some(wanted) = wanted_group {
        account.group = group_number(wanted, group)?;
        account.groups = [account.group].to_vec();
    } else {
        account.groups = memberships(&account, group);
    }
    Some(account)
}

fn group_number(wanted: &[u8], group: &[u8]) -> Option<u32> {
    let by_name = lines(group).find(|fields| fields.first() == Some(&wanted));
    by_name.and_then(|fields| number(fields.get(2)?)).or_else(|| number(wanted))
}

fn memberships(account: &Account, group: &[u8]) -> Vec<u32> {
    let mut groups = [account.group].to_vec();
    for fields in lines(group) {
        let (Some(id), Some(members)) = (fields.get(2).and_then(|id| number(id)), fields.get(3)) else {
            continue;
        };
        let member = members.split(|&byte| byte == b',').any(|name| !name.is_empty() && name == account.name);
        if member && !groups.contains(&id) {
            groups.push(id);
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/bash\nbroken\nann:x:1000:1001:Ann:/home/ann:/bin/sh\n";
    const GROUP: &[u8] = b"root:x:0:\nann:x:1001:\nsudo:x:27:bob,ann\nvideo:x:44:bob\n";

    #[test]
    fn accounts_are_found_by_name_and_number() {
        let ann = find(b"ann", PASSWD, GROUP).unwrap();
        assert_eq!((ann.user, ann.group, &ann.groups[..]), (1000, 1001, &[1001, 27][..]));
        assert_eq!((&ann.home[..], &ann.shell[..]), (&b"/home/ann"[..], &b"/bin/sh"[..]));
        assert_eq!(find(b"1000", PASSWD, GROUP), Some(ann));
        assert_eq!(find(b"", PASSWD, GROUP).unwrap().name, b"root");
    }

    #[test]
    fn a_group_may_be_given() {
        let ann = find(b"ann:video", PASSWD, GROUP).unwrap();
        assert_eq!((ann.user, ann.group, &ann.groups[..]), (1000, 44, &[44][..]));
        assert_eq!(find(b"ann:77", PASSWD, GROUP).unwrap().group, 77);
        assert_eq!(find(b"ann:nobody", PASSWD, GROUP), None);
    }

    #[test]
    fn a_number_needs_no_entry_and_a_name_does() {
        let unknown = find(b"4242", PASSWD, GROUP).unwrap();
        assert_eq!((unknown.user, unknown.group, &unknown.home[..]), (4242, 4242, &b"/"[..]));
        assert_eq!(find(b"eve", PASSWD, GROUP), None);
        assert_eq!(find(b"", b"", b"").unwrap().home, b"/root");
    }
}
