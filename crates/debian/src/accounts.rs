//! The guest's users and groups: Debian's base list (base-passwd) and the system users of packages (sysusers.d(5)).

use std::collections::BTreeSet;
use std::fmt::Write;

/// Highest number given to a system user without a fixed one (Debian Policy 9.2.2 keeps 100-999 for them).
const SYSTEM_ID_MAX: u32 = 999;

/// Users and groups, in the order of their files.
#[derive(Clone, Debug, Default)]
pub struct Accounts {
    users: Vec<User>,
    groups: Vec<Group>,
}

#[derive(Clone, Debug)]
struct User {
    name: String,
    uid: u32,
    gid: u32,
    comment: String,
    home: String,
    shell: String,
}

#[derive(Clone, Debug)]
struct Group {
    name: String,
    gid: u32,
    members: Vec<String>,
}

impl Accounts {
    /// Reads base-passwd's `passwd.master` and `group.master`.
    pub fn from_masters(passwd: &str, group: &str) -> Self {
        let users = passwd.lines().filter_map(|line| {
            let mut fields = line.split(':').map(str::to_owned);
            let (name, _, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            let (comment, home, shell) = (fields.next()?, fields.next()?, fields.next()?);
            Some(User { name, uid: uid.parse().ok()?, gid: gid.parse().ok()?, comment, home, shell })
        });
        let groups = group.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let (name, _, gid) = (fields.next()?, fields.next()?, fields.next()?);
            Some(Group { name: name.to_owned(), gid: gid.parse().ok()?, members: Vec::new() })
        });
        Accounts { users: users.collect(), groups: groups.collect() }
    }

    /// Adds what a sysusers.d file asks for and is not there yet.
    pub fn add_sysusers(&mut self, text: &str) {
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
            let words = split_words(line);
            let word = |place: usize| words.get(place).map(String::as_str).filter(|word| *word != "-");
            let (Some(kind), Some(name)) = (word(0), word(1)) else { continue };
            if !is_name(name) {
                continue;
            }
            match kind.trim_end_matches('!') {
                "u" => self.add_user(name, word(2), word(3), word(4), word(5)),
                "g" => {
                    self.add_group(name, word(2).and_then(|id| id.parse().ok()));
                }
                "m" => {
                    if let Some(group) = word(2).filter(|group| is_name(group)) {
                        self.add_group(group, None);
                        self.add_member(group, name);
                    }
                }
                _ => {}
            }
        }
    }

    fn add_user(
        &mut self,
        name: &str,
        id: Option<&str>,
        comment: Option<&str>,
        home: Option<&str>,
        shell: Option<&str>,
    ) {
        if self.users.iter().any(|user| user.name == name) {
            return;
        }
        let (uid, group) = id.unwrap_or_default().split_once(':').unwrap_or((id.unwrap_or_default(), ""));
        let fixed = uid.parse().ok();
        let gid = match group.parse().ok().or_else(|| self.gid_of(group)) {
            Some(gid) => gid,
            None => self.add_group(name, fixed),
        };
        let uid = fixed.filter(|uid| !self.has_uid(*uid)).unwrap_or_else(|| self.free_uid(gid));
        self.users.push(User {
            name: name.to_owned(),
            uid,
            gid,
            comment: comment.unwrap_or_default().replace([':', '\n'], ""),
            home: home.unwrap_or("/").replace([':', '\n'], ""),
            shell: shell.unwrap_or("/usr/sbin/nologin").replace([':', '\n'], ""),
        });
    }

    fn add_group(&mut self, name: &str, fixed: Option<u32>) -> u32 {
        if let Some(gid) = self.gid_of(name) {
            return gid;
        }
        let taken = |gid: &u32| self.groups.iter().any(|group| group.gid == *gid);
        let gid = fixed.filter(|gid| !taken(gid)).unwrap_or_else(|| self.free_id());
        self.groups.push(Group { name: name.to_owned(), gid, members: Vec::new() });
        gid
    }

    fn add_member(&mut self, group: &str, user: &str) {
        if let Some(group) = self.groups.iter_mut().find(|found| found.name == group)
            && !group.members.iter().any(|member| member == user)
        {
            group.members.push(user.to_owned());
        }
    }

    fn gid_of(&self, name: &str) -> Option<u32> {
        self.groups.iter().find(|group| group.name == name).map(|group| group.gid)
    }

    fn has_uid(&self, uid: u32) -> bool {
        self.users.iter().any(|user| user.uid == uid)
    }

    /// A user's number: that of its group if it has one of its own, so that both are equal, else the highest free one.
    fn free_uid(&self, gid: u32) -> u32 {
        let own = (1..=SYSTEM_ID_MAX).contains(&gid) && !self.has_uid(gid);
        if own { gid } else { self.free_id() }
    }

    /// The highest number for system users and groups that is free as both.
    fn free_id(&self) -> u32 {
        let groups: BTreeSet<u32> = self.groups.iter().map(|group| group.gid).collect();
        let free = (100..=SYSTEM_ID_MAX).rev().find(|id| !groups.contains(id) && !self.has_uid(*id));
        free.unwrap_or(SYSTEM_ID_MAX)
    }

    /// `/etc/passwd`
    pub fn passwd(&self) -> String {
        self.users.iter().fold(String::new(), |mut text, user| {
            let User { name, uid, gid, comment, home, shell } = user;
            let _ = writeln!(text, "{name}:x:{uid}:{gid}:{comment}:{home}:{shell}");
            text
        })
    }

    /// `/etc/group`
    pub fn group(&self) -> String {
        self.groups.iter().fold(String::new(), |mut text, group| {
            let _ = writeln!(text, "{}:x:{}:{}", group.name, group.gid, group.members.join(","));
            text
        })
    }

    /// `/etc/shadow`: nobody has a password. `day` is today, in days since 1970.
    pub fn shadow(&self, day: u64) -> String {
        self.users.iter().fold(String::new(), |mut text, user| {
            let _ = writeln!(text, "{}:*:{day}:0:99999:7:::", user.name);
            text
        })
    }

    /// `/etc/gshadow`
    pub fn gshadow(&self) -> String {
        self.groups.iter().fold(String::new(), |mut text, group| {
            let _ = writeln!(text, "{}:*::{}", group.name, group.members.join(","));
            text
        })
    }
}

fn is_name(name: &str) -> bool {
    name.len() <= 31
        && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// Splits at white space outside double quotes.
fn split_words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut any) = (Vec::new(), String::new(), false, false);
    for c in line.chars() {
        match c {
            '"' => {
                quoted = !quoted;
                any = true;
            }
            c if c.is_whitespace() && !quoted => {
                if any {
                    words.push(std::mem::take(&mut word));
                }
                any = false;
            }
            c => {
                word.push(c);
                any = true;
            }
        }
    }
    if any {
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn base() -> Accounts {
        Accounts::from_masters("root:*:0:0:root:/root:/bin/bash\n", "root:*:0:\ntty:*:5:\nnogroup:*:65534:\n")
    }

    #[test]
    fn system_users_get_numbers_once() {
        let mut accounts = base();
        accounts.add_sysusers(
            "g tty 5 -\nu root 0 - /root /bin/bash\n# c\nu! messagebus - \"System Message: Bus\" /run/dbus\n\
            u sshd -:65534 \"sshd user\" /run/sshd -\nu _x 77 - -\nm _x tty\n",
        );
        accounts.add_sysusers("u messagebus -\n");
        assert_eq!(
            accounts.passwd(),
            "root:x:0:0:root:/root:/bin/bash\nmessagebus:x:999:999:System Message Bus:/run/dbus:/usr/sbin/nologin\n\
             sshd:x:998:65534:sshd user:/run/sshd:/usr/sbin/nologin\n_x:x:77:77::/:/usr/sbin/nologin\n"
        );
        assert_eq!(
            accounts.group(),
            "root:x:0:\ntty:x:5:_x\nnogroup:x:65534:\nmessagebus:x:999:\n_x:x:77:\n"
        );
        assert!(accounts.shadow(20000).starts_with("root:*:20000:0:99999:7:::\n"));
        assert_eq!(accounts.gshadow().lines().count(), 5);
    }

    proptest! {
        #[test]
        fn lines_never_break_the_files(text in "(u |g |m |- |[a-z\"0-9: \\n]){0,40}") {
            let mut accounts = base();
            accounts.add_sysusers(&text);
            for line in accounts.passwd().lines() {
                prop_assert_eq!(line.matches(':').count(), 6, "{}", line);
            }
        }
    }
}
